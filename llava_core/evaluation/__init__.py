"""Evaluation: samples, answers, scores. Models and transports are passed in as an Answerer."""
