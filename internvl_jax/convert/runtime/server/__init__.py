"""An HTTP server for an exported model: ``python -m internvl_torch.server --model DIR``.

limits    what a request may cost, and how it is refused
bodies    the requests, checked, and their pictures
openai    chat completions, as OpenAI's clients write and read them
batching  one thread owns the engine; requests of the same kind are computed together
metrics   counts and seconds in Prometheus' text form
front     around every request: its id, its key, its errors, its count
api       the endpoints

Needs fastapi and uvicorn; nothing outside this package does.
"""
