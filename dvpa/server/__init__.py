"""The inference API: OpenAI-compatible, with tier telemetry, metrics and a dashboard.

config, schemas -> options -> backend -> generation, routes -> app -> main

Only this package knows HTTP, FastAPI and pydantic; the engine below it knows none of them.
"""
