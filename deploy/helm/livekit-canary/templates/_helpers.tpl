{{- define "canary.chartName" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "canary.name" -}}
{{- $chart := include "canary.chartName" . -}}
{{- $name := .Release.Name -}}
{{- if not (contains $chart $name) }}{{ $name = printf "%s-%s" $name $chart }}{{ end -}}
{{- .Values.fullnameOverride | default $name | trunc 53 | trimSuffix "-" -}}
{{- end }}

{{- define "canary.selector" -}}
app.kubernetes.io/name: {{ include "canary.chartName" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Without the selector, so that the Service sends nothing to the pod of `helm test`. */}}
{{- define "canary.commonLabels" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "canary.labels" -}}
{{ include "canary.selector" . }}
{{ include "canary.commonLabels" . }}
{{- end }}

{{- define "canary.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end }}

{{/* What the pod of the canary and the pod of `helm test` share. */}}
{{- define "canary.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with include "canary.serviceAccount" . }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "canary.serviceAccount" -}}
{{- with .Values.serviceAccount -}}
{{- if .create }}{{ .name | default (include "canary.name" $) }}{{ else }}{{ .name }}{{ end }}
{{- end -}}
{{- end }}

{{/* The health paths need no user, and the kubelet does not verify the certificate. */}}
{{- define "canary.httpGet" -}}
httpGet:
  path: {{ .path }}
  port: http
  scheme: {{ include "canary.scheme" .root | upper }}
timeoutSeconds: 5
{{- end }}

{{- define "canary.scheme" -}}
{{ if .Values.web.tls }}https{{ else }}http{{ end }}
{{- end }}

{{/* An endpoint of a ServiceMonitor or PodMonitor, from the values of it. */}}
{{- define "canary.endpoint" -}}
- port: http
  interval: {{ .monitor.interval }}
  {{- with .monitor.scrapeTimeout }}
  scrapeTimeout: {{ . }}
  {{- end }}
  scheme: {{ include "canary.scheme" .root }}
  {{- with .monitor.tlsConfig }}
  tlsConfig:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .monitor.basicAuth }}
  basicAuth:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or .root.Values.region .monitor.relabelings }}
  relabelings:
    {{- with .root.Values.region }}
    - targetLabel: region
      replacement: {{ . | quote }}
    {{- end }}
    {{- with .monitor.relabelings }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
{{- end }}

{{/* For each project: the Secret, and its keys. Either the name of a Secret alone, or an object. */}}
{{- define "canary.credential" -}}
{{- $names := dict "secret" . "apiKey" "api-key" "apiSecret" "api-secret" -}}
{{- if kindIs "map" . }}{{ $names = merge (deepCopy .) (omit $names "secret") }}{{ end -}}
{{- toYaml $names -}}
{{- end }}
