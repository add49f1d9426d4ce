# lion-st serve on CPUs: docker build -t lion-st-serve . && docker run -p 8080:8080 -v $PWD/runs:/runs lion-st-serve /runs/model
FROM python:3.12-slim

RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /source/
COPY lion_st /source/lion_st
RUN pip install --no-cache-dir "/source[serve]" && rm -r /source

# numba compiles the search once, into a folder that every user can write.
ENV NUMBA_CACHE_DIR=/tmp/numba HF_HOME=/tmp/huggingface
RUN useradd --create-home lion
USER lion
EXPOSE 8080
# In exec form, so that SIGTERM reaches the server, which answers what is under way before it ends.
ENTRYPOINT ["lion-st", "serve", "--host", "0.0.0.0"]
