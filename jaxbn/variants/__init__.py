"""What grew out of batch normalization: one module for each member of the family."""
