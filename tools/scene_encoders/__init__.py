"""Training of the scenes' frozen encoders; run by tools/train_scene_encoders.py."""
