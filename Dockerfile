# lcsc_opt with everything, and Ray with what KubeRay needs; docs/cluster.rayjob.yaml uses it:
#   docker build -t registry.example/lcsc:1 . && docker push registry.example/lcsc:1
# Never built by Docker where it was written; its pip commands were run.
FROM python:3.11-slim

# KubeRay's probes call wget
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lcsc_opt
COPY pyproject.toml constraints.txt README.md LICENSE THIRD_PARTY.md ./
COPY lcsc_opt lcsc_opt
COPY objectives objectives
COPY studies studies
COPY dashboards dashboards
# what .ci/run tests: the versions of constraints.txt, with the CUDA build of torch that the index has for Linux
RUN pip install --no-cache-dir -c constraints.txt '.[all]' 'ray[default]'

WORKDIR /studies
CMD ["lcsc", "--help"]
