"""dpo-train -m: many runs in folders numbered inside one, here or on a cluster, of a grid or of a search"""
