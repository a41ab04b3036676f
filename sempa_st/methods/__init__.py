"""Ways to read a sentence's vector off a decoder, each in a file of its own."""
