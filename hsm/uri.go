package hsm

import (
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/keyward/keyward/dek"
)

// A tokenURI is the part of RFC 7512 that selects a token. Empty means any.
type tokenURI struct {
	label, serial, model, manufacturer string
	slot                               int // -1: any
	pinSource                          string
}

// parseURI reads an RFC 7512 URI. Attributes that name objects or modules are
// refused, not ignored: a setting without effect is a trap. Errors never
// repeat attribute values, because people do put PINs there.
func parseURI(s string) (tokenURI, error) {
	u := tokenURI{slot: -1}
	rest, ok := strings.CutPrefix(s, "pkcs11:")
	if !ok {
		return u, fmt.Errorf("%w: token URI: must begin with pkcs11: (RFC 7512)", dek.ErrInvalid)
	}
	path, query, _ := strings.Cut(rest, "?")
	seen := map[string]bool{}
	each := func(list, sep string, set func(name, value string) bool) error {
		for part := range strings.SplitSeq(list, sep) {
			if part == "" {
				continue
			}
			name, raw, ok := strings.Cut(part, "=")
			value, err := url.PathUnescape(raw)
			if !ok || err != nil || seen[name] || !set(name, value) {
				return fmt.Errorf("%w: token URI: attribute %.20q is unknown here, twice, or malformed; use token, serial, model, manufacturer, slot-id and ?pin-source", dek.ErrInvalid, name)
			}
			seen[name] = true
		}
		return nil
	}
	if err := each(path, ";", u.setPath); err != nil {
		return tokenURI{}, err
	}
	if err := each(query, "&", u.setQuery); err != nil {
		return tokenURI{}, err
	}
	if u.label == "" && u.serial == "" && u.slot < 0 {
		return tokenURI{}, fmt.Errorf("%w: token URI: name the token by token=, serial= or slot-id=", dek.ErrInvalid)
	}
	return u, nil
}

func (u *tokenURI) setPath(name, value string) bool {
	switch name {
	case "token":
		u.label = value
	case "serial":
		u.serial = value
	case "model":
		u.model = value
	case "manufacturer":
		u.manufacturer = value
	case "slot-id":
		n, err := strconv.ParseUint(value, 10, 31)
		u.slot = int(n)
		return err == nil
	default:
		return false
	}
	return value != ""
}

func (u *tokenURI) setQuery(name, value string) bool {
	if name != "pin-source" {
		return false // pin-value above all
	}
	u.pinSource = strings.TrimPrefix(strings.TrimPrefix(value, "file:"), "//")
	return filepath.IsAbs(u.pinSource)
}

// String names the token for messages.
func (u tokenURI) String() string {
	var parts []string
	for _, f := range [][2]string{{"label", u.label}, {"serial", u.serial}, {"model", u.model}, {"manufacturer", u.manufacturer}} {
		if f[1] != "" {
			parts = append(parts, f[0]+" "+strconv.Quote(f[1]))
		}
	}
	if u.slot >= 0 {
		parts = append(parts, "slot "+strconv.Itoa(u.slot))
	}
	return strings.Join(parts, " ")
}

// firstFor reports whether crypto11, which looks at one attribute only, may take
// the token in slot for the one: it opens the first such.
func (u tokenURI) firstFor(slot uint, id Identity) bool {
	switch {
	case u.slot >= 0:
		return uint(u.slot) == slot
	case u.serial != "":
		return u.serial == id.Serial
	}
	return u.label == id.Label
}

// matches reports whether the token in slot is the one.
func (u tokenURI) matches(slot uint, id Identity) bool {
	for _, f := range [][2]string{{u.label, id.Label}, {u.serial, id.Serial}, {u.model, id.Model}, {u.manufacturer, id.Manufacturer}} {
		if f[0] != "" && f[0] != f[1] {
			return false
		}
	}
	return u.slot < 0 || uint(u.slot) == slot
}
