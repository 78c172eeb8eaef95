"""train.py --task pretrain: a model goes on learning from whole texts."""
