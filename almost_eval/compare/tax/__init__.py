"""The alignment tax: what a policy gained and lost in training. `tax` judges, `measure` runs what it judges by."""
