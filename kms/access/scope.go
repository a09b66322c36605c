package access

import (
	"fmt"
	"strings"

	"github.com/keyward/keyward/dek"
)

// CheckScope reports whether s is a place a role can be granted at: "/",
// "/vaults/V", "/vaults/V/keys/K" or "/vaults/V/keyrings/R". The error wraps
// dek.ErrInvalid.
func CheckScope(s string) error {
	if s == "/" {
		return nil
	}
	part := strings.Split(s, "/")
	shape := (len(part) == 3 || len(part) == 5) && part[0] == "" && part[1] == "vaults"
	if shape && len(part) == 5 {
		shape = part[3] == "keys" || part[3] == "keyrings"
	}
	if !shape {
		return fmt.Errorf("%w: scope %.80q: use /, /vaults/V, /vaults/V/keys/K or /vaults/V/keyrings/R", dek.ErrInvalid, s)
	}
	if err := dek.CheckName("scope vault", part[2]); err != nil {
		return err
	}
	if len(part) == 5 {
		return dek.CheckName("scope "+part[3], part[4])
	}
	return nil
}

// covers reports whether a grant at scope reaches the object at target: the
// same path or one below it, by whole segments. Paths that are not canonical
// are never reached, not even from "/".
func covers(scope, target string) bool {
	if !canonical(target) {
		return false
	}
	if scope == "/" || scope == target {
		return true
	}
	return len(target) > len(scope) && strings.HasPrefix(target, scope) && target[len(scope)] == '/'
}

// canonical reports whether p is "/" or "/a/b" made of the characters of
// names, without empty or dotted segments: what two readers could take for two
// places is no place.
func canonical(p string) bool {
	if p == "" || p[0] != '/' {
		return false
	}
	if p == "/" {
		return true
	}
	for i := 1; i < len(p); i++ {
		c := p[i]
		plain := c == '-' || c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !plain && (c != '/' || p[i-1] == '/') {
			return false
		}
	}
	return p[len(p)-1] != '/'
}
