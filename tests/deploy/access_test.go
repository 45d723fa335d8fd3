package deploy

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"golang.org/x/crypto/bcrypt"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
)

const password = "scrape"

// What stands for the Secret that web.secret names: a certificate for localhost, its key, and a web configuration with a user.
func webSecret(t *testing.T, folder, configuration string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotAfter:              time.Now().Add(time.Hour),
		DNSNames:              []string{"localhost"},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	certificate, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]pem.Block{
		"server.crt": {Type: "CERTIFICATE", Bytes: certificate},
		"server.key": {Type: "PRIVATE KEY", Bytes: private},
	} {
		write(t, filepath.Join(folder, file), string(pem.EncodeToMemory(&block)))
	}
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	users := "basic_auth_users:\n  prometheus: " + string(hash) + "\n"
	write(t, filepath.Join(folder, "web.yml"), configuration+users)
}

const serverCertificate = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"

// Starts a canary with this web configuration and without a batch, and returns its address.
func serve(t *testing.T, folder, configuration string) string {
	t.Helper()
	webSecret(t, folder, configuration)
	write(t, filepath.Join(folder, "canary.toml"), `
[http]
listen = "127.0.0.1:0"
web_config_file = "web.yml"
[history]
dir = "state"
[lifetime]
startup_delay = "10m"
shutdown_linger = "0s"
[projects.main]
url = "ws://127.0.0.1:9"
api_key = "key"
api_secret = "secret"
[targets.support]
agent_name = "support"
`)
	canary := command(binary(t), nil, "run", "--config", "canary.toml")
	canary.Dir = folder
	log, err := canary.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := canary.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		canary.Process.Kill()
		canary.Wait()
	})
	listening := regexp.MustCompile(`"address":"([0-9.:]+)"`)
	lines := bufio.NewScanner(log)
	var seen bytes.Buffer
	for lines.Scan() {
		seen.WriteString(lines.Text() + "\n")
		if found := listening.FindStringSubmatch(lines.Text()); found != nil {
			go func() {
				for lines.Scan() {
				}
			}()
			return found[1]
		}
	}
	t.Fatalf("it doesn't listen:\n%s", seen.String())
	return ""
}

func TestHealthCheckWorksWithAndWithoutTLSAndUsers(t *testing.T) {
	stages := stages(t, path(t, "deploy", "Dockerfile"))
	check := of[*instructions.HealthCheckCommand](stages[len(stages)-1])[0].Health.Test
	for name, configuration := range map[string]string{"users": "", "TLS and users": serverCertificate} {
		address := serve(t, t.TempDir(), configuration)
		// The image's command, which asks the default port, and the port of this canary.
		run(t, binary(t), append(check[2:], "http://"+address+"/-/healthy")...)
		output, err := command(binary(t), nil, "health", "http://"+address+"/metrics").CombinedOutput()
		if err == nil || !strings.Contains(string(output), "401") && !strings.Contains(string(output), "user") {
			t.Errorf("%s: a path that needs a user: %v %s", name, err, output)
		}
	}
}

func TestHealthCheckPresentsAClientCertificate(t *testing.T) {
	folder := t.TempDir()
	required := serverCertificate + "  client_auth_type: RequireAnyClientCert\n"
	url := "https://" + serve(t, folder, required) + "/-/healthy"
	if output, err := command(binary(t), nil, "health", url).CombinedOutput(); err == nil {
		t.Errorf("it needs none: %s", output)
	}
	certificate, key := filepath.Join(folder, "server.crt"), filepath.Join(folder, "server.key")
	run(t, binary(t), "health", "--client-cert", certificate, "--client-key", key, url)
	output, err := command(binary(t), nil, "health", "--client-cert", key, "--client-key", key, url).CombinedOutput()
	if err == nil || !strings.Contains(string(output), key) {
		t.Errorf("a file without a certificate: %v %s", err, output)
	}
}

// As the kubelet and Prometheus do what the manifests say.
func TestProbesTestAndScrapesOfTheChartWorkWithTLSAndUsers(t *testing.T) {
	files := render(t, values(t, "full"))
	container := one[apps.Deployment](t, files).Spec.Template.Spec.Containers[0]
	address := serve(t, t.TempDir(), serverCertificate)
	// The kubelet verifies no certificate.
	client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	get := func(url, user string) int {
		request, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if user != "" {
			request.SetBasicAuth(user, password)
		}
		response, err := client.Do(request)
		if err != nil {
			t.Fatalf("%s: %v", url, err)
		}
		response.Body.Close()
		return response.StatusCode
	}
	for _, probe := range []*core.Probe{container.LivenessProbe, container.ReadinessProbe} {
		url := strings.ToLower(string(probe.HTTPGet.Scheme)) + "://" + address + probe.HTTPGet.Path
		deadline := time.Now().Add(30 * time.Second)
		status := get(url, "")
		for status == http.StatusServiceUnavailable && time.Now().Before(deadline) {
			time.Sleep(100 * time.Millisecond)
			status = get(url, "")
		}
		if status != http.StatusOK {
			t.Errorf("%s: %d", url, status)
		}
	}
	endpoint := one[monitoring.ServiceMonitor](t, files).Spec.Endpoints[0]
	url := string(*endpoint.Scheme) + "://" + address + "/metrics"
	if endpoint.BasicAuth == nil || get(url, "prometheus") != http.StatusOK || get(url, "") != http.StatusUnauthorized {
		t.Error("the scrape is refused, or needs no user")
	}
	args := one[core.Pod](t, files).Spec.Containers[0].Args
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	args[1] = strings.Replace(args[1], "://probe:9787", "://127.0.0.1:"+port, 1)
	run(t, binary(t), args...)
}

// With the lines of the deployed configuration that are for it.
func TestDeployedPrometheusScrapesACanaryWithTLSAndUsers(t *testing.T) {
	folder := t.TempDir()
	address := serve(t, folder, serverCertificate)
	write(t, filepath.Join(folder, "password"), password)
	deployed := read(t, path(t, "deploy", "prometheus", "prometheus.yml"))
	for _, key := range []string{"scheme", "tls_config", "basic_auth"} {
		if !strings.Contains(deployed, "    # "+key+": ") {
			t.Fatalf("no line for %s", key)
		}
		deployed = strings.Replace(deployed, "    # "+key+": ", "    "+key+": ", 1)
	}
	file := filepath.Join(folder, "prometheus.yml")
	write(t, file, strings.NewReplacer("canary:9787", address, "rule_files: [livekit-canary.rules.yml]", "", "15s", "1s").Replace(deployed))
	port := freePort(t)
	background(t, "prometheus", "--config.file="+file, "--storage.tsdb.path="+t.TempDir(), "--web.listen-address=127.0.0.1:"+port)
	eventually(t, "a scrape", func() error {
		response, err := http.Get("http://127.0.0.1:" + port + "/api/v1/query?query=up%7Bjob%3D%22livekit-canary%22%7D")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		answer, err := io.ReadAll(response.Body)
		if err == nil && !strings.Contains(string(answer), `,"1"]`) {
			err = fmt.Errorf("%s", answer)
		}
		return err
	})
}
