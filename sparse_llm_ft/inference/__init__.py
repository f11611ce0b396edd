"""Uses a trained run: reads its folder, evaluates it, generates predictions."""
