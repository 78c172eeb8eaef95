"""One model on several devices: their discovery, its replicas as processes, what deals work to them."""
