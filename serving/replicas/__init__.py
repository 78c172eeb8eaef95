"""One model on several devices: what they are, and its replicas as processes."""
