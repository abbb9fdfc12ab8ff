"""What an encoder or a classifier knows: the stages evaluate, predict, probe and extract, and what
they share.
"""
