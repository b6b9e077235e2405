"""The recipes of images, on a loop of accelerate's: `training.main` runs a `training.Recipe`."""
