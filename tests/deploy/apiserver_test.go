package deploy

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"sigs.k8s.io/yaml"
)

// What setup.sh prints, by name.
var programs = sync.OnceValues(func() (map[string]string, error) {
	setup := exec.Command("./setup.sh")
	setup.Stderr = os.Stderr
	output, err := setup.Output()
	if err != nil {
		return nil, fmt.Errorf("setup.sh: %w", err)
	}
	found := map[string]string{}
	for _, line := range strings.Fields(string(output)) {
		name, file, _ := strings.Cut(line, "=")
		found[name] = file
	}
	return found, nil
})

func program(t *testing.T, name string) string {
	t.Helper()
	found, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	if found[name] == "" {
		t.Fatalf("setup.sh prints no %s", name)
	}
	return found[name]
}

// A kube-apiserver with an etcd, and nothing else: no scheduler, no controller and no node.
type cluster struct {
	config   *rest.Config
	warnings *warnings
}

// Collects what kubectl prints as warnings.
type warnings struct{ texts []string }

func (it *warnings) HandleWarningHeader(_ int, _ string, text string) {
	it.texts = append(it.texts, text)
}

func startCluster(t *testing.T) *cluster {
	t.Helper()
	folder := t.TempDir()
	etcd, peer, port := freePort(t), freePort(t), freePort(t)
	store := "http://127.0.0.1:" + etcd
	background(t, program(t, "ETCD"),
		"--data-dir="+filepath.Join(folder, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls="+store, "--advertise-client-urls="+store,
		"--listen-peer-urls=http://127.0.0.1:"+peer)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	signer := filepath.Join(folder, "service-accounts.key")
	write(t, signer, string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private})))
	users := filepath.Join(folder, "users.csv")
	write(t, users, "token,admin,admin,system:masters\n")
	background(t, program(t, "KUBE_APISERVER"),
		"--etcd-servers="+store, "--bind-address=127.0.0.1", "--secure-port="+port,
		"--cert-dir="+folder, "--token-auth-file="+users, "--authorization-mode=RBAC",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+signer,
		"--service-account-signing-key-file="+signer, "--service-cluster-ip-range=10.0.0.0/24,fd00::/112")
	found := &warnings{}
	config := &rest.Config{
		Host:            "https://127.0.0.1:" + port,
		BearerToken:     "token",
		TLSClientConfig: rest.TLSClientConfig{Insecure: true},
		WarningHandler:  found,
	}
	client := kubernetes.NewForConfigOrDie(config)
	eventually(t, "the API server to be ready", func() error {
		return client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(context.Background()).Error()
	})
	return &cluster{config, found}
}

// The last output of a program that doesn't start is in the log of the test.
func background(t *testing.T, program string, args ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	started := exec.Command(program, args...)
	started.Stdout, started.Stderr = log, log
	if err := started.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		started.Process.Kill()
		started.Wait()
		if text := read(t, log.Name()); t.Failed() {
			t.Logf("%s:\n%s", program, text[max(0, len(text)-4000):])
		}
	})
}

func freePort(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func eventually(t *testing.T, what string, ask func() error) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		err := ask()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// Applies a document as `kubectl apply --server-side`, with what else the options ask for.
func (it *cluster) apply(document string, options meta.ApplyOptions) error {
	object := &unstructured.Unstructured{}
	if err := yaml.UnmarshalStrict([]byte(document), &object.Object); err != nil {
		return err
	}
	kind := object.GroupVersionKind()
	discovered := memory.NewMemCacheClient(kubernetes.NewForConfigOrDie(it.config).Discovery())
	mapping, err := restmapper.NewDeferredDiscoveryRESTMapper(discovered).RESTMapping(kind.GroupKind(), kind.Version)
	if err != nil {
		return err
	}
	resource := dynamic.NewForConfigOrDie(it.config).Resource(mapping.Resource)
	options.FieldManager = "test"
	if mapping.Scope.Name() != "namespace" {
		_, err = resource.Apply(context.Background(), object.GetName(), object, options)
		return err
	}
	_, err = resource.Namespace("canaries").Apply(context.Background(), object.GetName(), object, options)
	return err
}

func TestAPIServerAcceptsEveryManifest(t *testing.T) {
	cluster := startCluster(t)
	crds, err := filepath.Glob(filepath.Join(program(t, "CRDS"), "*_*monitor*.yaml"))
	rules, _ := filepath.Glob(filepath.Join(program(t, "CRDS"), "*_prometheusrules.yaml"))
	if crds = append(crds, rules...); err != nil || len(crds) != 3 {
		t.Fatalf("%v: %v", crds, err)
	}
	for _, file := range crds {
		if err := cluster.apply(read(t, file), meta.ApplyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	// It warns of a pod that the strictest standard for pods would refuse.
	for _, document := range []string{
		"apiVersion: v1\nkind: Namespace\nmetadata:\n  name: canaries\n  labels:\n    pod-security.kubernetes.io/warn: restricted\n",
		"apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: default\n",
		"apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: probe\n",
	} {
		if err := cluster.apply(document, meta.ApplyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	monitors := schema.GroupVersion{Group: "monitoring.coreos.com", Version: "v1"}.String()
	client := kubernetes.NewForConfigOrDie(cluster.config)
	eventually(t, "the types of prometheus-operator", func() error {
		served, err := client.Discovery().ServerResourcesForGroupVersion(monitors)
		if err == nil && len(served.APIResources) < len(crds) {
			err = fmt.Errorf("%d of them", len(served.APIResources))
		}
		return err
	})

	dry := meta.ApplyOptions{DryRun: []string{meta.DryRunAll}, Force: true}
	all := map[string]map[string]any{"least": values(t, "least"), "full": values(t, "full"), "pods": values(t, "full")}
	all["pods"]["serviceMonitor"] = map[string]any{"enabled": false}
	all["pods"]["podMonitor"] = map[string]any{"enabled": true}
	for release, values := range all {
		for _, document := range manifests(render(t, values)) {
			cluster.warnings.texts = nil
			if err := cluster.apply(document, dry); err != nil {
				t.Errorf("%s: %v:\n%s", release, err, document)
			}
			if len(cluster.warnings.texts) > 0 {
				t.Errorf("%s: %q:\n%s", release, cluster.warnings.texts, document)
			}
		}
	}

	// The server would notice a pod with rights, and mistakes.
	cluster.warnings.texts = nil
	privileged := values(t, "least")
	privileged["securityContext"] = map[string]any{"allowPrivilegeEscalation": true}
	for _, document := range manifests(render(t, privileged)) {
		if err := cluster.apply(document, dry); err != nil {
			t.Error(err)
		}
	}
	if text := strings.Join(cluster.warnings.texts, "\n"); !strings.Contains(text, "allowPrivilegeEscalation") {
		t.Errorf("it warns of nothing: %q", text)
	}
	broken := map[string]func(string) string{
		"a field that its type lacks": func(text string) string { return strings.Replace(text, "selector:", "selektor:", 1) },
		"a value out of range":        func(text string) string { return strings.Replace(text, "9787", "97870", 1) },
	}
	for mistake, breakIt := range broken {
		for _, document := range manifests(render(t, values(t, "least"))) {
			if !strings.Contains(document, "kind: Service\n") {
				continue
			}
			if err := cluster.apply(breakIt(document), dry); err == nil {
				t.Errorf("%s is accepted", mistake)
			}
		}
	}
}
