# The service and the demo's page with the bundled model of photographs, offline; docs/service.md shows how to run it.
FROM python:3.12-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY conf conf
# Not passed to pip without this line: --build-arg PIP_EXTRA_INDEX_URL=URL, an index with torch for CPUs alone.
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir ".[gallery,serve]" && useradd --uid 10001 --no-create-home union
# Only /tmp is written: run with --read-only --tmpfs /tmp.
ENV HF_HUB_OFFLINE=1 HOME=/tmp UNION_CACHE=/tmp
USER 10001
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"]
ENTRYPOINT ["union-serve", "host=0.0.0.0"]
CMD ["index=/data/photos.lance"]
