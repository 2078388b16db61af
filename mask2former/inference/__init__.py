"""Use of a trained model: images, folders and videos in, results and reports out."""
