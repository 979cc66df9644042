{{- define "finetune-operator.healthPort" }}8081{{ end }}

{{- /* The operator's settings: finetune_operator/settings.py. Environment variables are strings, objects JSON. */}}
{{- define "finetune-operator.env" -}}
{{- $resources := dict }}
{{- range $kind, $amounts := .Values.trainer.resources }}
{{- $strings := dict }}
{{- range $name, $amount := $amounts }}{{ $_ := set $strings $name (toString $amount) }}{{ end }}
{{- $_ := set $resources $kind $strings }}
{{- end }}
{{- $settings := dict
  "TRAINER_IMAGE" (include "finetune-operator.image" (list .Values.trainer.image .))
  "IMAGE_PULL_POLICY" .Values.trainer.image.pullPolicy
  "TRAINER_ENV" (toJson .Values.trainer.env)
  "ALLOW_REMOTE_CODE" .Values.trainer.allowRemoteCode
  "ENDPOINTS" (toJson .Values.trainer.endpoints)
  "DEFAULT_RESOURCES" (toJson $resources)
  "DEFAULT_VOLUME_SIZE" .Values.trainer.volume.size
  "DEFAULT_STORAGE_CLASS" .Values.trainer.volume.storageClassName
  "DEFAULT_ACCESS_MODE" .Values.trainer.volume.accessMode
  "START_DEADLINE_SECONDS" .Values.operator.startDeadlineSeconds
  "PROGRESS_INTERVAL_SECONDS" .Values.operator.progressIntervalSeconds
  "RETRY_BACKOFF_SECONDS" .Values.operator.retryBackoffSeconds
  "WATCH_NAMESPACE" .Values.operator.watchNamespace
  "LEASE" (printf "%s/%s" .Release.Namespace (include "finetune-operator.fullname" .))
  "WORKERS" .Values.operator.workers
  "RESYNC_SECONDS" .Values.operator.resyncSeconds
  "REQUEST_TIMEOUT_SECONDS" .Values.operator.requestTimeoutSeconds
  "HEALTH_PORT" (include "finetune-operator.healthPort" .)
  "LOG_LEVEL" .Values.operator.logLevel
  "LOG_FORMAT" .Values.operator.logFormat }}
{{- range $name, $value := $settings }}
- {name: FINETUNE_{{ $name }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end }}
