"""What is trained on, and from: data sets and pretrained weights, fetched and verified once."""
