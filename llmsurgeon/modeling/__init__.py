"""The files that are copied as they are into checkpoints. They need torch and transformers and nothing of ours."""
