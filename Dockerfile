# lion-st serve on CPUs: docker build -t lion-st-serve . && docker run -p 8080:8080 -v $PWD/runs:/runs lion-st-serve /runs/model
FROM python:3.12-slim

RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /source/
COPY lion_st /source/lion_st
RUN pip install --no-cache-dir "/source[serve]" && rm -r /source

# numba compiles the search once, into a folder that every user can write.
ENV NUMBA_CACHE_DIR=/tmp/numba HF_HOME=/tmp/huggingface
RUN useradd --create-home --uid 1000 lion
# By number, by which Kubernetes knows that it is not root.
USER 1000
EXPOSE 8080
# Loading a large model takes minutes.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=8)"]
# In exec form, so that SIGTERM reaches the server, which answers what is under way before it ends.
ENTRYPOINT ["lion-st", "serve", "--host", "0.0.0.0"]
