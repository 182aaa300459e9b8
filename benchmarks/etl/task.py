"""What both sides are asked to do, so that neither can drift from the other."""

MIN_RATING = 3.0
CORE = 5
SEED = 0
VALIDATION = TEST = 0.1
INTERACTIONS = "interactions-*.tsv"
# Side -> its file, and the kind of each feature of it. `users.tsv` has the column `user_id`, `items.tsv` `item_id`.
FEATURES = {
    "users": ("users.tsv", {"country": "category", "age": "numeric"}),
    "items": ("items.tsv", {"category": "category", "tags": "tags", "year": "numeric"}),
}
COUNTS = ("read", "rejected", "kept", "users", "items", "train", "validation", "test")
"""What both must agree on."""
