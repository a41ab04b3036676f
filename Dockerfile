# A server of the shipped models on CPUs: docker build -t sempa . && docker run -p 8000:8000 -e SEMPA_API_KEY=secret sempa
FROM python:3.11-slim

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
RUN useradd --create-home sempa
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY sempa_st sempa_st
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt ".[serve,demo]"

USER sempa
WORKDIR /home/sempa
# The base is prepared once, here, so that a container starts without it.
RUN echo "It rains." | sempa encode sempa-gemma3-270m-activated - --output /tmp/prepared.npy && rm /tmp/prepared.npy
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# The page and everything else are open to whoever reaches the port; SEMPA_API_KEY asks for a key.
ENTRYPOINT ["sempa", "serve", "--host", "0.0.0.0"]
