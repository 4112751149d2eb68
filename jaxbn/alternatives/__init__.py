"""What reaches the ends of batch normalization by another way: a module for each."""
