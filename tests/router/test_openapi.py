"""The OpenAPI document is open, whole, and its examples work."""

import httpx

from tests.router.conftest import Deploy


async def test_the_examples_of_the_document_work(deploy: Deploy) -> None:
    async with deploy(prefill=0, api_key="key") as served:
        async with httpx.AsyncClient(base_url=served.url) as stranger:
            document = (await stranger.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        assert document["paths"].keys() >= {"/v1/models", "/health", "/metrics"}
        tried = set()
        for path, operations in document["paths"].items():
            body = operations.get("post", {}).get("requestBody")
            if body is None:
                continue
            content = body["content"]["application/json"]
            name = content["schema"]["$ref"].removeprefix("#/components/schemas/")
            schema = document["components"]["schemas"][name]
            assert schema["properties"].keys() >= content["example"].keys()
            response = await served.http.post(path, json=content["example"])
            assert response.status_code == 200, (path, response.text)
            tried.add(path)
        assert tried >= {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"}
