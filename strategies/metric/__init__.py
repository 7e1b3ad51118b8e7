"""Strategies of the kind `metric`: how near a picture is to the 16-bit model's, or how good it is by itself."""
