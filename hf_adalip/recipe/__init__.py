"""The training kit of the recipes: `image`, on accelerate's loop, and `trainer`, on transformers'.

What both share is here: options, data of the Hub, a run with its folder and results, checkpoints.
"""
