{{- define "finetune-operator.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride }}
{{- else if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "finetune-operator.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "finetune-operator.labels" -}}
{{ include "finetune-operator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "finetune-operator.serviceAccount" -}}
{{- if .Values.serviceAccount.name }}{{ .Values.serviceAccount.name }}
{{- else if .Values.serviceAccount.create }}{{ include "finetune-operator.fullname" . }}
{{- else }}{{ fail "serviceAccount.name is needed where serviceAccount.create is false" }}
{{- end }}
{{- end }}

{{- /* Takes (list <image> <root>). */}}
{{- define "finetune-operator.image" -}}
{{- $image := first . }}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}
{{- else }}{{ $image.repository }}:{{ $image.tag | default (last .).Chart.AppVersion }}
{{- end }}
{{- end }}

{{- /* Where the operator looks for work: the whole cluster unless one namespace is named. */}}
{{- define "finetune-operator.scope" -}}
{{ if .Values.operator.watchNamespace }}Role{{ else }}ClusterRole{{ end }}
{{- end }}
