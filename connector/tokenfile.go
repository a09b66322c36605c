package connector

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// tokenFileVersion is the only version of the token file there is.
const tokenFileVersion = 1

// maxTokenFileBytes bounds what ReadTokenFile reads.
const maxTokenFileBytes = 64 << 10

// A TokenFile lets one principal enrol once: an officer makes it, the person
// or host it is for uses it. It is a secret until it is redeemed or ends.
type TokenFile struct {
	// Endpoints are host:port addresses of the key service, at least one.
	Endpoints []string
	// CAFingerprint is the SHA-256 of the service's root certificate (DER) in
	// hexadecimal. It is what makes the first connection safe.
	CAFingerprint string
	// Principal is who the certificate will name: "person/NAME" or "host/NAME".
	Principal string
	// Expires is when the token ends.
	Expires time.Time
	// Instance, Kind, Vault and Keyrings describe the prepared database; empty
	// in tokens for people.
	Instance string
	Kind     string
	Vault    string
	Keyrings []string
	// Token is the one-time secret itself.
	Token SecretText
}

// A SecretText is a short secret: an enrolment token. It can't be printed,
// logged or encoded; Reveal is the one way to its text.
type SecretText struct{ s string }

// NewSecretText makes a SecretText of s.
func NewSecretText(s string) SecretText { return SecretText{s} }

// Reveal returns the secret itself.
func (t SecretText) Reveal() string { return t.s }

// IsZero reports whether there is no secret.
func (t SecretText) IsZero() bool { return t.s == "" }

// Format prints a fixed text for every verb.
func (SecretText) Format(s fmt.State, _ rune) {
	_, _ = io.WriteString(s, "connector.SecretText(redacted)")
}

// LogValue logs a fixed text.
func (SecretText) LogValue() slog.Value { return slog.StringValue("connector.SecretText(redacted)") }

// MarshalText refuses: secrets leave through Reveal only.
func (SecretText) MarshalText() ([]byte, error) {
	return nil, fmt.Errorf("%w: a secret text is not encoded", dek.ErrInvalid)
}

// tokenFileJSON is the file's form.
type tokenFileJSON struct {
	Version       int       `json:"keyward_token"`
	Endpoints     []string  `json:"endpoints"`
	CAFingerprint string    `json:"ca_sha256"`
	Principal     string    `json:"principal"`
	Expires       time.Time `json:"expires"`
	Instance      string    `json:"instance,omitempty"`
	Kind          string    `json:"kind,omitempty"`
	Vault         string    `json:"vault,omitempty"`
	Keyrings      []string  `json:"keyrings,omitempty"`
	Token         string    `json:"token"`
}

// ParseTokenFile reads what Encode wrote. Unknown fields, missing ones and
// anything after the object are refused with dek.ErrInvalid.
func ParseTokenFile(b []byte) (TokenFile, error) {
	if len(b) > maxTokenFileBytes {
		return TokenFile{}, fmt.Errorf("%w: token file over %d bytes", dek.ErrInvalid, maxTokenFileBytes)
	}
	var j tokenFileJSON
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		// The decoder's words may quote the file, and with it the secret.
		return TokenFile{}, fmt.Errorf("%w: token file is not the JSON that `keyward plugin prepare` wrote: copy it again whole", dek.ErrInvalid)
	}
	if _, err := d.Token(); err != io.EOF {
		return TokenFile{}, fmt.Errorf("%w: token file: data after its end", dek.ErrInvalid)
	}
	if j.Version != tokenFileVersion {
		return TokenFile{}, fmt.Errorf("%w: token file version %d: this program reads %d", dek.ErrInvalid, j.Version, tokenFileVersion)
	}
	t := TokenFile{
		Endpoints: j.Endpoints, CAFingerprint: j.CAFingerprint, Principal: j.Principal, Expires: j.Expires,
		Instance: j.Instance, Kind: j.Kind, Vault: j.Vault, Keyrings: j.Keyrings, Token: SecretText{j.Token},
	}
	return t, t.Check()
}

// Check reports the first field that can't be right, as dek.ErrInvalid.
func (t TokenFile) Check() error {
	if err := checkEndpoints(t.Endpoints); err != nil {
		return fmt.Errorf("token file: %w", err)
	}
	if fp, err := hex.DecodeString(t.CAFingerprint); err != nil || len(fp) != 32 {
		return fmt.Errorf("%w: token file: ca_sha256 is not 64 hexadecimal digits", dek.ErrInvalid)
	}
	kind, name, ok := strings.Cut(t.Principal, "/")
	if !ok || kind != "person" && kind != "host" {
		return fmt.Errorf("%w: token file: principal %q is not person/NAME or host/NAME", dek.ErrInvalid, t.Principal)
	}
	if err := dek.CheckName("principal", name); err != nil {
		return fmt.Errorf("token file: %w", err)
	}
	if t.Token.IsZero() {
		return fmt.Errorf("%w: token file: no token", dek.ErrInvalid)
	}
	if t.Expires.IsZero() {
		return fmt.Errorf("%w: token file: no expiry", dek.ErrInvalid)
	}
	for field, s := range map[string]string{"instance": t.Instance, "kind": t.Kind, "vault": t.Vault} {
		if s == "" {
			continue
		}
		if err := dek.CheckName(field, s); err != nil {
			return fmt.Errorf("token file: %w", err)
		}
	}
	return nil
}

// Encode returns the file's bytes, the secret among them: write them with mode
// 0600 (Save does) or hand them over on standard output only when asked to.
func (t TokenFile) Encode() ([]byte, error) {
	if err := t.Check(); err != nil {
		return nil, err
	}
	j := tokenFileJSON{
		Version: tokenFileVersion, Endpoints: t.Endpoints, CAFingerprint: t.CAFingerprint, Principal: t.Principal,
		Expires: t.Expires.UTC().Truncate(time.Second), Instance: t.Instance, Kind: t.Kind, Vault: t.Vault,
		Keyrings: t.Keyrings, Token: t.Token.s,
	}
	b, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("token file: %w", err)
	}
	return append(b, '\n'), nil
}

// Save writes the file with mode 0600, durably. It refuses with dek.ErrExists
// to replace another file.
func (t TokenFile) Save(path string) error {
	b, err := t.Encode()
	if err != nil {
		return err
	}
	defer clear(b)
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%w: %s: choose another name or remove it", dek.ErrExists, path)
	}
	return writeFileDurably(path, b, 0o600)
}

// ReadTokenFile reads path, which must be a regular file that only its owner
// can read. Errors wrap dek.ErrInvalid, dek.ErrNotFound for an absent file.
func ReadTokenFile(path string) (TokenFile, error) {
	b, err := readPrivate(path, maxTokenFileBytes)
	if err != nil {
		return TokenFile{}, fmt.Errorf("token file: %w", err)
	}
	defer clear(b)
	t, err := ParseTokenFile(b)
	if err != nil {
		return TokenFile{}, fmt.Errorf("%s: %w", path, err)
	}
	return t, nil
}

// checkEndpoints wants at least one host:port and no doubles.
func checkEndpoints(endpoints []string) error {
	if len(endpoints) == 0 {
		return fmt.Errorf("%w: no endpoint: give host:port of the key service", dek.ErrInvalid)
	}
	seen := map[string]bool{}
	for _, e := range endpoints {
		host, port, err := net.SplitHostPort(e)
		if err != nil || host == "" || port == "" {
			return fmt.Errorf("%w: endpoint %q is not host:port", dek.ErrInvalid, e)
		}
		if seen[e] {
			return fmt.Errorf("%w: endpoint %q is named twice", dek.ErrInvalid, e)
		}
		seen[e] = true
	}
	return nil
}

// readPrivate reads a regular file of at most limit bytes that group and
// others can't read.
func readPrivate(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		class := dek.ErrInvalid
		if os.IsNotExist(err) {
			class = dek.ErrNotFound
		}
		return nil, fmt.Errorf("%w: %w", class, err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrInvalid, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", dek.ErrInvalid, path)
	}
	if info.Mode().Perm()&fs.FileMode(0o077) != 0 {
		return nil, fmt.Errorf("%w: %s can be read by others (mode %04o): chmod 600 it", dek.ErrInvalid, path, info.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrInvalid, err)
	}
	if int64(len(b)) > limit {
		clear(b)
		return nil, fmt.Errorf("%w: %s is over %d bytes", dek.ErrInvalid, path, limit)
	}
	return b, nil
}
