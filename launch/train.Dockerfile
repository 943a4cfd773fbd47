# The image of python -m speechjax.launch gke.  From the root of the repository, EXTRA=tpu or gpu:
#   docker build -f launch/train.Dockerfile --build-arg EXTRA=tpu -t IMAGE . && docker push IMAGE
FROM python:3.11-slim
ARG EXTRA=tpu
WORKDIR /opt/speechjax
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY speechjax speechjax
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[$EXTRA]"
COPY configs configs
