"""What a recipe needs around its model: data to train on and pictures to look at. Needs the extra `train`."""
