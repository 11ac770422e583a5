"""Operators of the model and the losses: one public function per file, each with a plain torch reference."""
