"""Metrics for those who watch elsewhere: TensorBoard, W&B, MLflow, trackio, and a table of them as CSV"""
