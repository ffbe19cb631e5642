"""What a person looks at: pictures of predictions."""
