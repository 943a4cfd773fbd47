# Workers of preparation on Beam, for DataflowRunner, FlinkRunner and SparkRunner.  From the root of the repository:
#   docker build -f launch/beam.Dockerfile -t IMAGE .
# Launcher and workers must have the same version of Python and of Beam.
FROM apache/beam_python3.11_sdk:2.77.0
COPY launch/beam_requirements.txt /tmp/
RUN pip install --no-cache-dir -r /tmp/beam_requirements.txt
COPY speechjax /opt/speechjax/speechjax
ENV PYTHONPATH=/opt/speechjax
