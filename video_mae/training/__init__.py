"""Training under DeepSpeed: the stages pretrain and finetune, and the loop, engine and journal that
they share.
"""
