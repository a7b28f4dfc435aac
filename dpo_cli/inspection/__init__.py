"""What dpo-data tells of a data set: read as training reads it, looked at without a model's weights"""
