package connector_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

const secretWord = "one-time-secret"

func goodTokenFile() connector.TokenFile {
	return connector.TokenFile{
		Endpoints: []string{"kms1:7443", "[::1]:7443"}, CAFingerprint: strings.Repeat("ab", 32), Principal: "host/db1",
		Expires: time.Unix(1_800_000_000, 0).UTC(), Instance: "shop", Kind: "mariadb", Vault: "acme",
		Keyrings: []string{"orders"}, Token: connector.NewSecretText(secretWord),
	}
}

func TestTokenFileCheck(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(*connector.TokenFile)
		want error
	}{
		{"good", func(*connector.TokenFile) {}, nil},
		{"a person's", func(f *connector.TokenFile) { f.Principal, f.Instance, f.Kind, f.Vault = "person/alice", "", "", "" }, nil},
		{"no endpoint", func(f *connector.TokenFile) { f.Endpoints = nil }, dek.ErrInvalid},
		{"endpoint twice", func(f *connector.TokenFile) { f.Endpoints[1] = f.Endpoints[0] }, dek.ErrInvalid},
		{"endpoint without port", func(f *connector.TokenFile) { f.Endpoints[0] = "kms1" }, dek.ErrInvalid},
		{"short fingerprint", func(f *connector.TokenFile) { f.CAFingerprint = "abcd" }, dek.ErrInvalid},
		{"no kind of principal", func(f *connector.TokenFile) { f.Principal = "alice" }, dek.ErrInvalid},
		{"system principal", func(f *connector.TokenFile) { f.Principal = "system/kms" }, dek.ErrInvalid},
		{"path in principal", func(f *connector.TokenFile) { f.Principal = "host/../x" }, dek.ErrInvalid},
		{"no token", func(f *connector.TokenFile) { f.Token = connector.SecretText{} }, dek.ErrInvalid},
		{"no expiry", func(f *connector.TokenFile) { f.Expires = time.Time{} }, dek.ErrInvalid},
		{"instance name", func(f *connector.TokenFile) { f.Instance = "../shop" }, dek.ErrInvalid},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := goodTokenFile()
			tc.edit(&f)
			path := filepath.Join(t.TempDir(), "token")
			if err := f.Save(path); !errors.Is(err, tc.want) {
				t.Fatalf("got %v, want %v", err, tc.want)
			} else if err != nil {
				return
			}
			back, err := connector.ReadTokenFile(path)
			if err != nil || back.Token.Reveal() != secretWord || fmt.Sprint(back) != fmt.Sprint(f) {
				t.Errorf("read back: %v, %v, want %v", back, err, f)
			}
			if err := f.Save(path); !errors.Is(err, dek.ErrExists) {
				t.Errorf("second save: %v", err)
			}
			if err := os.Chmod(path, 0o640); err != nil {
				t.Fatal(err)
			}
			if _, err := connector.ReadTokenFile(path); !errors.Is(err, dek.ErrInvalid) {
				t.Errorf("readable by a group: %v", err)
			}
		})
	}
}

// The format is fixed: a file written today is read tomorrow.
func TestTokenFileGolden(t *testing.T) {
	const path = "testdata/tokenfile.json"
	b := must(goodTokenFile().Encode())
	if *update {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if want := must(os.ReadFile(path)); string(want) != string(b) {
		t.Errorf("got %s, want %s", b, want)
	}
}

func FuzzTokenFile(f *testing.F) {
	good := must(goodTokenFile().Encode())
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte(`{"keyward_token":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		tf, err := connector.ParseTokenFile(b)
		if err != nil {
			if !errors.Is(err, dek.ErrInvalid) {
				t.Fatalf("class of %v", err)
			}
			return
		}
		again, err := tf.Encode()
		if err != nil {
			t.Fatalf("parsed but not encoded: %v", err)
		}
		if _, err := connector.ParseTokenFile(again); err != nil {
			t.Fatalf("encoded but not parsed: %v", err)
		}
	})
}

// No secret leaves by print, log or encoder, nor by the errors of a broken file.
func TestSecretsDoNotPrint(t *testing.T) {
	f := goodTokenFile()
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "token", f.Token, "file", f)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "token", f.Token, "file", f)
	out := log.String()
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		out += fmt.Sprintf(verb, f) + fmt.Sprintf(verb, f.Token) + fmt.Sprintf(verb, &f)
	}
	if b, err := json.Marshal(f); err == nil {
		t.Errorf("encoded: %s", b)
	}
	b := must(json.Marshal(connector.EnrolmentToken{Text: f.Token}))
	out += string(b)
	for _, broken := range []string{`{"keyward_token":1,"token":"` + secretWord + `","x":1}`, `{"keyward_token":1,"token":{"a":"` + secretWord + `"}}`, `"` + secretWord} {
		_, err := connector.ParseTokenFile([]byte(broken))
		out += fmt.Sprint(err)
	}
	if strings.Contains(out, secretWord) || strings.Contains(out, fmt.Sprintf("%x", secretWord)) {
		t.Errorf("the secret is in %q", out)
	}
}

// enrolments edit a good one, and say what comes of it.
var enrolments = []struct {
	name string
	edit func(t *testing.T, k *fakeKMS, f *connector.TokenFile, o *connector.EnrollOptions)
	want error
}{
	{"good", func(*testing.T, *fakeKMS, *connector.TokenFile, *connector.EnrollOptions) {}, nil},
	{"a person", func(_ *testing.T, _ *fakeKMS, _ *connector.TokenFile, o *connector.EnrollOptions) {
		o.HostSecretFile = ""
	}, nil},
	{"first endpoint dead", func(t *testing.T, k *fakeKMS, f *connector.TokenFile, _ *connector.EnrollOptions) {
		f.Endpoints = []string{refusedAddress(t), k.addr}
	}, nil},
	{"all endpoints dead", func(t *testing.T, _ *fakeKMS, f *connector.TokenFile, _ *connector.EnrollOptions) {
		f.Endpoints = []string{refusedAddress(t)}
	}, dek.ErrUnavailable},
	{"foreign service", func(t *testing.T, _ *fakeKMS, f *connector.TokenFile, _ *connector.EnrollOptions) {
		f.CAFingerprint = connector.Fingerprint(newTestCA(t, "other").cert.Raw)
	}, dek.ErrAuth},
	{"key fingerprint", func(_ *testing.T, k *fakeKMS, f *connector.TokenFile, _ *connector.EnrollOptions) {
		f.CAFingerprint = connector.Fingerprint(k.ca.cert.RawSubjectPublicKeyInfo)
	}, nil},
	{"wrong token", func(_ *testing.T, _ *fakeKMS, f *connector.TokenFile, _ *connector.EnrollOptions) {
		f.Token = connector.NewSecretText("guess")
	}, dek.ErrDenied},
	{"ended token", func(_ *testing.T, _ *fakeKMS, f *connector.TokenFile, _ *connector.EnrollOptions) {
		f.Expires = time.Now().Add(-time.Second)
	}, dek.ErrDenied},
	{"other principal", func(_ *testing.T, _ *fakeKMS, f *connector.TokenFile, _ *connector.EnrollOptions) {
		f.Principal = "host/db2"
	}, dek.ErrAuth},
	{"host secret in the directory", func(_ *testing.T, _ *fakeKMS, _ *connector.TokenFile, o *connector.EnrollOptions) {
		o.HostSecretFile = filepath.Join(o.Dir, "host-secret")
	}, dek.ErrInvalid},
	{"world-readable host secret", func(t *testing.T, _ *fakeKMS, _ *connector.TokenFile, o *connector.EnrollOptions) {
		if err := os.WriteFile(o.HostSecretFile, []byte(strings.Repeat("00", 32)), 0o644); err != nil { //nolint:gosec // the mistake
			t.Fatal(err)
		}
	}, dek.ErrInvalid},
	{"directory others write to", func(t *testing.T, _ *fakeKMS, _ *connector.TokenFile, o *connector.EnrollOptions) {
		if err := errors.Join(os.MkdirAll(o.Dir, 0o700), os.Chmod(o.Dir, 0o777)); err != nil { //nolint:gosec // the mistake
			t.Fatal(err)
		}
	}, dek.ErrInvalid},
	{"enrolled already", func(t *testing.T, k *fakeKMS, f *connector.TokenFile, o *connector.EnrollOptions) {
		i := must(connector.Enroll(testContext(t), *f, *o))
		i.Close()
		k.set(func() { k.token = secretWord })
	}, dek.ErrExists},
}

func TestEnroll(t *testing.T) {
	ca := newTestCA(t, "ca")
	for _, tc := range enrolments {
		t.Run(tc.name, func(t *testing.T) {
			k := newFakeKMS(t, ca)
			f, o := k.tokenFile(), connector.EnrollOptions{Dir: filepath.Join(t.TempDir(), "state"), HostSecretFile: filepath.Join(t.TempDir(), "secret")}
			tc.edit(t, k, &f, &o)
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			i, err := connector.Enroll(ctx, f, o)
			if !errors.Is(err, tc.want) {
				t.Fatalf("got %v, want %v", err, tc.want)
			}
			if strings.Contains(fmt.Sprint(err), secretWord) {
				t.Errorf("the token is in %v", err)
			}
			if err != nil {
				return
			}
			i.Close()
			i = must(connector.LoadIdentity(o.Dir, o.HostSecretFile))
			defer i.Close()
			if got := i.Principal(); got != "host/db1" || i.CAFingerprint() != connector.Fingerprint(ca.cert.Raw) {
				t.Errorf("loaded %v, CA %s", got, i.CAFingerprint())
			}
			checkModes(t, o.Dir)
		})
	}
}

// checkModes finds what others could read, and files left over.
func checkModes(t *testing.T, dir string) {
	n := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		n++
		return err
	})
	if err != nil || n != 2 {
		t.Errorf("%d names in %s, %v; want the directory and one file", n, dir, err)
	}
}

// A token is not spent if the identity could not be stored.
func TestEnrollProbesDiskFirst(t *testing.T) {
	k := newFakeKMS(t, newTestCA(t, "ca"))
	if _, err := connector.Enroll(testContext(t), k.tokenFile(), connector.EnrollOptions{Dir: "/proc/nowhere"}); err == nil {
		t.Fatal("stored in /proc")
	}
	if n := k.count("Enroll"); n != 0 {
		t.Errorf("the service was asked %d times", n)
	}
}

// Of many that start at once, all use one host secret.
func TestHostSecretRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d", "secret")
	keys := make(chan *dek.Key, 8)
	for range cap(keys) {
		go func() { keys <- must(connector.OpenHostSecret(path, true)) }()
	}
	first := <-keys
	defer first.Destroy()
	for range cap(keys) - 1 {
		k := <-keys
		if !k.Equal(first) {
			t.Error("two secrets")
		}
		k.Destroy()
	}
}

func TestHostSecretCredential(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	file := filepath.Join(dir, "elsewhere")
	a := must(connector.OpenHostSecret(file, true)) // no credential: the file counts
	defer a.Destroy()
	if err := os.WriteFile(filepath.Join(dir, connector.HostSecretCredential), []byte(strings.Repeat("17", 32)+"\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	b := must(connector.OpenHostSecret(file, false))
	defer b.Destroy()
	if a.Equal(b) {
		t.Error("the credential was not used")
	}
	for _, bad := range []string{"", "17", strings.Repeat("zz", 32), strings.Repeat("17", 33)} {
		if err := errors.Join(os.Remove(filepath.Join(dir, connector.HostSecretCredential)), os.WriteFile(filepath.Join(dir, connector.HostSecretCredential), []byte(bad), 0o400)); err != nil {
			t.Fatal(err)
		}
		if _, err := connector.OpenHostSecret(file, true); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("%q: got %v", bad, err)
		}
	}
}

// A renewal replaces file and connections; calls go on meanwhile.
func TestRenew(t *testing.T) {
	k := newFakeKMS(t, newTestCA(t, "ca"))
	dir, secret := k.identity(t)
	i := must(connector.LoadIdentity(dir, secret))
	defer i.Close()
	var dials atomic.Int64
	c := must(connector.NewClient(connector.Config{Identity: i, Logger: quiet(), Dial: func(ctx context.Context, addr string) (net.Conn, error) {
		dials.Add(1)
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}}))
	defer c.Close()
	old := must(os.ReadFile(filepath.Join(dir, "identity.json")))
	if done, err := c.RenewIfDue(testContext(t)); done || err != nil {
		t.Fatalf("too early: %v, %v", done, err)
	}
	if err := c.RenewIdentity(testContext(t)); err != nil {
		t.Fatal(err)
	}
	key, err := c.Unwrap(testContext(t), wrapped(t, "orders", 1))
	if err != nil {
		t.Fatal(err)
	}
	key.Destroy()
	if n := dials.Load(); n != 2 {
		t.Errorf("%d connections, want one before and one after", n)
	}
	if string(old) == string(must(os.ReadFile(filepath.Join(dir, "identity.json")))) {
		t.Error("the file is as before")
	}
	must(connector.LoadIdentity(dir, secret)).Close()
}
