"""What the files of the families have in common: the words that they are written in, and the parts that several share."""
