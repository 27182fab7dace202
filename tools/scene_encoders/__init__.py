"""Training of the frozen encoders for scenes; tools/train_scene_encoders.py runs it."""
