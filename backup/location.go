package backup

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"gocloud.dev/blob"
	"gocloud.dev/blob/fileblob"
)

// Location is a place of backups, taken apart.
type Location struct {
	// Scheme is file, s3, gs or azblob.
	Scheme string
	// Path is the directory of a file location, absolute.
	Path string
	// Bucket, Prefix and Query are of the others. Prefix has no slash at
	// either end; Query holds options of the driver.
	Bucket, Prefix string
	Query          url.Values
}

const maxLocationLen = 2048

// bucketName is what all three vendors accept, and nothing that could be taken
// for a host, a port or a path.
var bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$`)

// prefixElement is one step of the path inside of a bucket.
var prefixElement = regexp.MustCompile(`^[A-Za-z0-9=+@,_-][A-Za-z0-9=+@,._-]{0,127}$`)

// ParseLocation takes text apart: file:///path, a bare path, or one of
// s3://, gs:// and azblob:// followed by bucket/prefix?option=value. The error
// matches ErrInvalidURL.
func ParseLocation(text string) (Location, error) {
	bad := func(format string, args ...any) (Location, error) {
		return Location{}, fmt.Errorf("%w %q: %s", ErrInvalidURL, clip(text), fmt.Sprintf(format, args...))
	}
	switch {
	case text == "":
		return bad("it is empty; give a directory, or file://, s3://, gs:// or azblob:// and a path")
	case len(text) > maxLocationLen:
		return bad("it is longer than %d bytes", maxLocationLen)
	case strings.ContainsFunc(text, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return bad("it contains control characters")
	}
	scheme, rest, isURL := strings.Cut(text, "://")
	if !isURL {
		scheme, rest = "file", text
	}
	if scheme == "file" {
		switch {
		case rest == "":
			return bad("the path is empty")
		case slices.Contains(strings.Split(filepath.ToSlash(rest), "/"), ".."):
			return bad(`".." is not allowed; give the absolute path`)
		}
		path, err := filepath.Abs(rest)
		if err != nil {
			return bad("%v", err)
		}
		return Location{Scheme: "file", Path: path}, nil
	}
	if scheme != "s3" && scheme != "gs" && scheme != "azblob" {
		return bad("unknown scheme %q; use file, s3, gs or azblob", clip(scheme))
	}
	u, err := url.Parse(text)
	if err != nil {
		// The error repeats the text, and what looks like a password in it.
		return bad("it is not a URL")
	}
	l := Location{Scheme: scheme, Bucket: u.Host, Prefix: strings.Trim(u.Path, "/")}
	switch {
	case u.User != nil:
		return Location{}, fmt.Errorf("%w: credentials do not belong into a URL, which ends up in logs; "+
			"they are taken from the environment", ErrInvalidURL)
	case !bucketName.MatchString(u.Host):
		return bad("%q cannot be the name of a bucket", clip(u.Host))
	case u.Fragment != "":
		return bad("'#' is not allowed")
	}
	if l.Query, err = url.ParseQuery(u.RawQuery); err != nil {
		return bad("the options behind '?' cannot be read")
	}
	if l.Prefix != "" {
		for _, element := range strings.Split(l.Prefix, "/") {
			if !prefixElement.MatchString(element) {
				return bad("%q cannot be part of the path", clip(element))
			}
		}
	}
	return l, nil
}

// String returns the location as ParseLocation takes it.
func (l Location) String() string {
	if l.Scheme == "file" {
		return "file://" + l.Path
	}
	s := l.Scheme + "://" + l.Bucket
	if l.Prefix != "" {
		s += "/" + l.Prefix
	}
	if len(l.Query) > 0 {
		s += "?" + l.Query.Encode()
	}
	return s
}

// bucket opens what l names. A missing directory is made with create only.
func (l Location) bucket(ctx context.Context, create bool) (*blob.Bucket, error) {
	if l.Scheme == "file" {
		return fileblob.OpenBucket(l.Path, &fileblob.Options{
			CreateDir:   create,
			DirFileMode: 0o750,
			// A rename from another file system fails.
			NoTempDir: true,
			Metadata:  fileblob.MetadataDontWrite,
		})
	}
	mux := blob.DefaultURLMux()
	if !mux.ValidBucketScheme(l.Scheme) {
		return nil, errors.New("this program was built without the driver of " + l.Scheme + "://")
	}
	u := url.URL{Scheme: l.Scheme, Host: l.Bucket, RawQuery: l.Query.Encode()}
	b, err := mux.OpenBucketURL(ctx, &u)
	if err == nil && l.Prefix != "" {
		b = blob.PrefixedBucket(b, l.Prefix+"/")
	}
	return b, err
}
