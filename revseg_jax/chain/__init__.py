"""What the two turns say: prompts out, answers in, and the map from keyframe to image coordinates. Pure Python."""
