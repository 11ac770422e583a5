"""Operators behind the model and the losses: one public function a file, each beside its plain reference."""
