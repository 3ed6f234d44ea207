SELECT soak.settle(:client_id);
