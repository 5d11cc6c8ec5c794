"""`llava batch`: answers to a file of questions or about a folder of pictures, with Ray Data, each exactly once."""
