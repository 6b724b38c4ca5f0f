package offline

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/snap"
)

// Image is an image of the state found in a data directory.
type Image struct {
	// Place is the folder it lies in, relative to the data directory.
	Place string
	// Name is that of its directory; Dir is the whole path.
	Name, Dir string
	Info      snap.Info
	// Err says why it cannot be used. After List it is about the manifest only.
	Err error
}

// imagePlaces are the folders of a data directory that hold images.
var imagePlaces = []string{datadir.ImagesName, filepath.Join(datadir.BackupsName, "images")}

// ListImages returns the images in the data directory dir, those made for
// followers first, in each folder the newest first. It reads manifests only,
// changes nothing and may run beside a node: an image that disappears meanwhile
// is left out.
func ListImages(dir string) ([]Image, error) {
	if err := isDirectory(dir); err != nil {
		return nil, err
	}
	if _, err := datadir.ReadIdentity(dir); err != nil {
		return nil, err
	}
	var all []Image
	for _, place := range imagePlaces {
		list, err := listImages(vfs.Default, filepath.Join(dir, place))
		if err != nil {
			return nil, err
		}
		for i := range list {
			list[i].Place = place
		}
		all = append(all, list...)
	}
	return all, nil
}

// listImages lists the images in one folder; none when it is not there.
func listImages(fsys vfs.FS, folder string) ([]Image, error) {
	names, err := fsys.List(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var list []Image
	for _, name := range names {
		dir := filepath.Join(folder, name)
		st, err := fsys.Stat(dir)
		// What begins with a dot is being made or removed.
		if strings.HasPrefix(name, ".") || err != nil || !st.IsDir() {
			continue
		}
		im := Image{Name: name, Dir: dir}
		im.Info, im.Err = snap.Inspect(fsys, dir)
		if errors.Is(im.Err, snap.ErrNotFound) {
			continue
		}
		if im.Err == nil && im.Info.ID != name {
			im.Err = &snap.CorruptError{Image: name, File: "MANIFEST", Detail: "it belongs to image " + im.Info.ID}
		}
		list = append(list, im)
	}
	slices.SortFunc(list, func(a, b Image) int {
		if a.Info.Index != b.Info.Index {
			if a.Info.Index > b.Info.Index {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Name, b.Name)
	})
	return list, nil
}

// CheckImage reads the image completely and returns it with Err set when a byte
// of it is not the one that was written. gone is true when the image was removed
// meanwhile, which a running node does to old ones.
func CheckImage(im Image) (_ Image, gone bool) {
	if im.Err != nil {
		return im, false
	}
	fsys := vfs.Default
	im.Err = snap.Check(fsys, im.Dir)
	if im.Err != nil {
		if _, err := fsys.Stat(im.Dir); errors.Is(err, fs.ErrNotExist) {
			return im, true
		}
	}
	return im, false
}
