"""An OpenAI-compatible HTTP server over one model: needs the extra `serve` (starlette, uvicorn)."""
