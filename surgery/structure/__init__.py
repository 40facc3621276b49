"""What a model is made of, read off its modules, or off one forward. Nothing here changes it.

Users meet `surgery.Site`, which rules and parts are given, and `surgery.anatomy(model)`.
"""
