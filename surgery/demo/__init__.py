"""A demo on real images that needs no download: printed glyphs to handwritten digits."""
