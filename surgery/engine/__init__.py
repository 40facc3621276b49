"""What is done to a model: rules meet it, a plan is made and carried out, watched and undone.

Users import it from `surgery`: apply, plan, report, anatomy, revert, merge, disabled, ...
"""
